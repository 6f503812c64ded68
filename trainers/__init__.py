"""Fine-tuning for Gen2Embed models: self-aware hard negative sampling (SaHa), its baselines, and the trainer.

The package is reserved here so that its name is settled; this version of Gen2Embed embeds and evaluates without
training, and nothing can be imported from here yet. The dependency runs one way: this package will import
``gen2embed_mteb``, never the reverse.
"""
