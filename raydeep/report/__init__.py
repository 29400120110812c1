"""The report: one self-contained HTML page made from nothing but a run folder."""
