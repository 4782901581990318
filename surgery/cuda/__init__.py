"""Where nodes would run on CUDA, told without a GPU.

kernels        the CUDA provider's kernels, as one released wheel lists them (kernels.json)
limits         what its kernels refuse beyond their registration, by version
prediction     the provider of each node, with the reason, and the copies in between
"""
