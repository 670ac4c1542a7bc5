"""`python -m ztna`, where the `ztna` script is not at hand."""

from ztna.cli.main import main

if __name__ == "__main__":
    main()
