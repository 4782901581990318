"""Proof that a folder is its source.

validation     the stages, in order, and what they find
closing        the proof that repack and strip end with
structure      the folder by itself: interface, configuration, caches, wiring
prompts        the cases; prompt_file reads them from JSON Lines, prompts.jsonl are the shipped ones
recording      what a model answers to the cases; golden keeps a recording in a file
comparison     two recordings, position by position; parity is the whole in one line
gates          checks with thresholds that can fail; thresholds has their defaults and reasons
generation     the real runtime, onnxruntime-genai
trace          where each node ran, from a session's own profile
watch          the residual stream against float16's limit; residual finds it in a graph
bisect         the first node where two graphs part
report         what a validation came to
"""

from surgery.verify.validation import TOKENS, Request, prove_folder

__all__ = ["TOKENS", "Request", "prove_folder"]
