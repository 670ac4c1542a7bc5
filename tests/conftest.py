"""Settings of the whole test suite."""

from hypothesis import settings

# The same examples in every run: a failure seen once is seen again. No deadline an example: a busy
# machine is no defect of the code.
settings.register_profile("ztna", derandomize=True, deadline=None)
settings.load_profile("ztna")
