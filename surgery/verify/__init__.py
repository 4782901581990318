"""Proof that a folder is its source.

validation            the stages, in order, and what they find; request is what it is asked for
number_proof          the numbers against the source's, or a recording's
closing_proof         the proof that repack and strip end with; contained runs it in a process of its own, stages
                      tells how far it is
structure             the folder by itself: interface, caches, attention
source_files          its ids and layers, held against the source's files; configuration: every key of its settings
prompts               the cases; prompt_file reads them from JSON Lines, prompts.jsonl are the shipped ones
made_up_caches        caches that put a case past the window without its prompt
recording             what a model answers to the cases; golden keeps a recording in a file
agreement             two recordings, position by position; parity is the whole in one line
gates                 checks with thresholds that can fail; thresholds has their defaults and reasons
accuracy              what an accuracy level changes, by itself
genai_proof           the real runtime, onnxruntime-genai; multimodal_proof: with images and sound
two_graph_proof       the proof of a folder with two graphs
execution_profile     where each node ran, from a session's own profile
fp16_headroom         the residual stream against float16's limit; residual_stream finds it in a graph
bisect                the first node where two graphs part
report                what a validation came to
"""

from surgery.verify.request import TOKENS, Request
from surgery.verify.validation import prove_folder

__all__ = ["TOKENS", "Request", "prove_folder"]
