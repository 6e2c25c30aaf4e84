"""iNaturalist 2018 in small: the layout and the fields of the real files, with a few tiny pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPECIES = {
    3111: ("Aves", "Turdus merula", (40, 40, 40)),
    4265: ("Reptilia", "Chelonia mydas", (40, 160, 60)),
    4264: ("Reptilia", "Zootoca vivipara", (200, 60, 40)),
    4344: ("Reptilia", 'Anolis "sagrei", Cuban', (60, 60, 220)),
}
"""Category id -> supercategory, name, colour of its pictures. Names and ids are not in the same order."""
TRAIN, VAL = 4, 2
"""Pictures of each species."""


def make_inat(folder: Path) -> Path:
    """Write the data set into `folder`; returns it. Each species' first validation picture is grey."""
    random = np.random.default_rng(0)
    categories = [
        {"id": key, "name": name, "supercategory": group, "kingdom": "Animalia", "genus": name.split()[0]}
        for key, (group, name, _) in SPECIES.items()
    ]
    (folder / "categories.json").write_text(json.dumps(categories))
    image_id = 1000
    for split, count in (("train", TRAIN), ("val", VAL)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for key, (group, _, colour) in SPECIES.items():
            (folder / f"train_val2018/{group}/{key}").mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image_id += 1
                name = f"train_val2018/{group}/{key}/{image_id:032x}.jpg"
                height, width = 40 + 11 * i, 72 - 9 * i
                noise = random.integers(-30, 30, (height, width, 3))
                picture = Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
                (picture.convert("L") if split == "val" and not i else picture).save(folder / name, quality=95)
                size = {"width": width, "height": height}
                images.append({"id": image_id, "file_name": name, **size, "license": 3, "rights_holder": "N. N."})
                annotations.append({"id": image_id, "image_id": image_id, "category_id": key})
        data = {
            "info": {"year": 2018},
            "licenses": [{"id": 3, "name": "CC BY-NC"}],
            "categories": [{**entry, "name": str(entry["id"] * 7)} for entry in categories],  # obfuscated
            "images": images,
            "annotations": annotations[::-1],
        }
        (folder / f"{split}2018.json").write_text(json.dumps(data))
    return folder


def edit(path: Path, change: Any) -> None:
    """Let `change` alter the data of a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
