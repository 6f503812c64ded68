"""Gen2Embed inside mteb: models by name, an encoder, MMEB, MMEB-mini and SugarCrepe++ as tasks, two benchmarks.

`registration.install` puts all of it into mteb's registries; the start-up hook calls it once mteb has been imported.
"""
