"""Text for a terminal: what came from a file or the network must not steer it."""


def printable(text: str) -> str:
    """Text with every control character but the newline written as an escape."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )
