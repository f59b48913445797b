"""Predictors outside a mesh: kept in directories, trained on files, judged by files."""
