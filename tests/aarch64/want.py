"""How a stage says that it did not find what it must."""


class Failed(Exception):
    """A stage did not show what it must."""


def want(true: bool, text: str) -> None:
    """Raises Failed with `text` unless `true`."""
    if not true:
        raise Failed(text)
