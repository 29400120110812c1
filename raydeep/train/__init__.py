"""The training loop (which knows no Ray) and the launcher that runs it on Ray Train."""
