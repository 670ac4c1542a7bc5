"""Which packet numbers were received: the window that refuses duplicates and replays.

RFC 9000 section 12.3 wants duplicates discarded, and lets a receiver forget by a floor below which
everything counts as received.
"""

from collections.abc import Callable

# Our choice: batches of 64 packets that overtake each other on several queues stay far inside;
# as one integer of 512 bytes a shift costs some 0.1 us.
WINDOW_SIZE = 4096

_ALL = (1 << WINDOW_SIZE) - 1


class ReplayWindow:
    """The last WINDOW_SIZE packet numbers as one integer: bit i stands for `highest - i`.

    highest: largest number received, -1 before any.
    """

    def __init__(
        self, highest: int = -1, known: Callable[[int], bool] = lambda _number: False
    ) -> None:
        """known: tells of the numbers up to `highest` whether they were received."""
        self.highest = highest
        self._bits = 0
        for number in range(max(0, highest - WINDOW_SIZE + 1), highest + 1):
            self._bits |= known(number) << (highest - number)

    def __contains__(self, packet_number: int) -> bool:
        """Whether a number was received, or is too old to tell."""
        age = self.highest - packet_number
        return age >= 0 and (age >= WINDOW_SIZE or bool(self._bits >> age & 1))

    def add(self, packet_number: int) -> None:
        """Note one number; one that is too old is noted already."""
        age = self.highest - packet_number
        if age < 0:
            self.add_run(packet_number, packet_number + 1)
        elif age < WINDOW_SIZE:
            self._bits |= 1 << age

    def add_run(self, first: int, stop: int) -> None:
        """Note the numbers first..stop-1, all of which lie above `highest`."""
        shift = stop - 1 - self.highest
        self._bits = (self._bits << min(shift, WINDOW_SIZE) | (1 << (stop - first)) - 1) & _ALL
        self.highest = stop - 1
