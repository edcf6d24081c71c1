"""Figures in the units that keep them readable."""


def format_bytes(size: float) -> str:
    """A size in bytes with the binary unit that keeps it readable: 45.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
