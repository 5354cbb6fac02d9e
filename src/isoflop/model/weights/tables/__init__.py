"""The families' tables; registry.py lists them by `model_type`."""
