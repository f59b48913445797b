"""Lengths predicted from the words of a prompt: fast, learnt while serving, without a GPU."""
