"""Backends that have not been shown to pay off on real hardware; nothing in the library depends on them."""
