"""The runtime matrix: which version of ONNX Runtime GenAI does what with a repacked folder.

python -m validation.runtimes WORK

subjects.py       the folders under test
questions.py      what each is asked, and the source pair's answers
environments.py   one virtual environment per version
probe.py          asks, in a process of its own, inside such an environment
outcomes.py       from a probe's answers to cells
table.py          the document, and the comparison with the committed one
notes.py          why some cells are not `ok`
"""
