"""Tasks that look something up in a long prompt: passkey, needle, RULER, key-values."""
