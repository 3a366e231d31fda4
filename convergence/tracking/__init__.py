"""Sends the results of studies to MLflow."""
