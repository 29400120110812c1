"""Export, verification in a clean process, and prediction from exported models."""
