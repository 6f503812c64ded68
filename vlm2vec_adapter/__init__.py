"""An adapter that lets VLM2Vec's own evaluation scripts run a Gen2Embed model as one of their backbones.

The package is reserved here so that its name is settled; nothing can be imported from here yet. The dependency runs
one way: this package will import ``gen2embed_mteb``, never the reverse.
"""
