"""Function calling by BFCL's rules: the right call, no call where none fits, and what was no call at all."""
