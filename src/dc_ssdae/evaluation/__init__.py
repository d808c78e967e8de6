"""Measuring models: metrics, profiles and reports."""
