"""Holds what a suite of trials and a published table share: files of results, and the check of their recipes."""
