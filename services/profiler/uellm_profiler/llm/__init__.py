"""The predictor ``llm``: a language model that was tuned to say how long answers become."""
