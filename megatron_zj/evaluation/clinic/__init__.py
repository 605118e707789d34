"""A small Chinese clinic whose truth is known: data for the demo, and rules that judge an answer.

Written for testing software.  The table is simplified and is no medical advice.
"""
