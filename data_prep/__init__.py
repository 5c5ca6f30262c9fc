"""Builds what training reads: SOMA stores, protein tables, simulated atlases. Imports tftrain, never the reverse."""
