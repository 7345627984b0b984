"""Every setting: the dataclasses, the presets that fill them, and what a protocol changes."""
