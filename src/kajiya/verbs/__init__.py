"""Verbs of the command line by what they are about, the options that several take, and how they speak."""
