"""Tracking of studies in MLflow."""
