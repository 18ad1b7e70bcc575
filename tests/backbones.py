"""Backbones: which modules are adapted, one fingerprint for any dtype, and what is refused in one line."""
