"""Evaluation: lm-eval as it should be run on a chat model, with a record per prompt."""
