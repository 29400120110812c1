"""Sizing Ray for the machine, and talking to clusters."""
