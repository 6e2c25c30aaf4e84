"""The published xT models: checkpoints and configs of bair-climate-initiative/xT read as they are.

The release (4e79e41, and 390372a, which trained the checkpoints) differs in many small ways from the models of
`gigaxt.nn`. What agrees is shared: regions and their streaming, the region encoder, the linear classifier, losses,
saving, training. What differs is in this package and nowhere else:

    published.py   the YAML with `base_configs` and `${...}`
    config.py      what its `model` section means as a `ModelConfig`
    weights.py     checkpoint files and the names of their weights
    context.py     class token, positions, windows        (context kinds `xt_release` and `xt_release_pooled`)
    layers.py      attention and Mamba layers
    parts.py       tokens without a norm, the two heads
    importer.py    `gigaxt.from_xt_release`
    scores.py      the published table, and a run over the images that it was measured on
"""
