"""The transformers library as a source of modelling code: architectures that have no file in bitgrain.models run through it.

    library.py   finds the architecture and makes an empty model of it: parameters without memory, buffers with their values
    names.py     what the checkpoint calls each of its modules
    layout.py    the modules as slots, so that the plan is made as for any other architecture
    modules.py   linear layers and embeddings that run chosen kernels in the place of the library's
    experts.py   the same for experts that the library stacks
    cache.py     the library's cache behind the interface of ours
    model.py     the running model: what CausalLM offers to an engine

The library is imported when an architecture is looked up in it, not before.
"""
