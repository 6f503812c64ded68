"""Gen2Embed inside mteb: models by name, an encoder, two benchmarks, and MMEB, MMEB-mini and SugarCrepe++ as tasks.

`registration.install` adds them to mteb's registries; the start-up hook calls it once mteb has been imported.
"""
