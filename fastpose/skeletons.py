"""Skeletons: what the keypoints of a data set are called, how they are drawn, mirrored and scored."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Skeleton:
    """The keypoints of one annotation scheme.

    Attributes:
        name: identifier, e.g. ``"coco17"``.
        names: keypoint names in storage order; left and right are the person's own.
        links: pairs of keypoint indices joined by a line when drawn.
        flip_pairs: pairs of indices that change places when the image is mirrored.
        sigmas: per-keypoint standard deviations of the annotation, relative to the square root of the object's area
            (the COCO ``sigmas``; OKS uses ``(2 * sigma) ** 2 * area`` in its denominator).
        upper_body: indices of the keypoints above the waist, for half-body augmentation; the rest are the lower body.
    """

    name: str
    names: tuple[str, ...]
    links: tuple[tuple[int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    upper_body: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        k = len(self.names)
        if len(set(self.names)) != k:
            raise ValueError(f"skeleton {self.name!r}: keypoint names must be unique, got {self.names}")
        if len(self.sigmas) != k:
            raise ValueError(f"skeleton {self.name!r}: expected {k} sigmas, one per keypoint, got {len(self.sigmas)}")
        if any(s <= 0 for s in self.sigmas):
            raise ValueError(f"skeleton {self.name!r}: sigmas must be positive, got {self.sigmas}")
        for what, pairs in (("links", self.links), ("flip_pairs", self.flip_pairs)):
            for a, b in pairs:
                if not (0 <= a < k and 0 <= b < k and a != b):
                    raise ValueError(
                        f"skeleton {self.name!r}: {what} must hold two different indices below {k}, got {(a, b)}"
                    )
        if any(not 0 <= i < k for i in self.upper_body):
            raise ValueError(f"skeleton {self.name!r}: upper_body must hold indices below {k}, got {self.upper_body}")
        flat = [i for pair in self.flip_pairs for i in pair]
        if len(set(flat)) != len(flat):
            raise ValueError(f"skeleton {self.name!r}: a keypoint occurs twice in flip_pairs {self.flip_pairs}")

    @property
    def undefined(self) -> bool:
        """Whether nothing but names and links is known, as of annotations without a skeleton file."""
        return self.name == UNDEFINED and set(self.sigmas) == {DEFAULT_SIGMA}

    @property
    def num_keypoints(self) -> int:
        """Number of keypoints K."""
        return len(self.names)

    @property
    def flip_indices(self) -> list[int]:
        """Permutation p of length K: keypoint i of a mirrored image is keypoint ``p[i]`` of the original."""
        perm = list(range(self.num_keypoints))
        for a, b in self.flip_pairs:
            perm[a], perm[b] = b, a
        return perm


# COCO's sigmas, and for neck and head, which COCO has not, CrowdPose's 0.079. LSP and MPII define none and take these:
# the thorax that of the neck, the pelvis that of the hips.
SIGMAS = {
    "nose": 0.026,
    "eye": 0.025,
    "ear": 0.035,
    "shoulder": 0.079,
    "elbow": 0.072,
    "wrist": 0.062,
    "hip": 0.107,
    "knee": 0.087,
    "ankle": 0.089,
    "head": 0.079,
    "head_top": 0.079,
    "upper_neck": 0.079,
    "neck": 0.079,
    "thorax": 0.079,
    "pelvis": 0.107,
}


def _person(name: str, names: tuple[str, ...], **fields: Any) -> Skeleton:
    sigmas = tuple(SIGMAS[n.removeprefix("left_").removeprefix("right_")] for n in names)
    return Skeleton(name, names, sigmas=sigmas, **fields)


COCO17 = _person(
    name="coco17",
    names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear",
        "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
        "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
    ),
    links=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    upper_body=tuple(range(11)),
)  # fmt: skip

LSP14 = _person(
    name="lsp14",
    names=(
        "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle",
        "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist",
        "neck", "head_top",
    ),
    links=(
        (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 12), (9, 12), (9, 10), (10, 11), (12, 13), (8, 2),
        (9, 3),
    ),
    flip_pairs=((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9)),
    upper_body=tuple(range(6, 14)),
)  # fmt: skip

MPII16 = _person(
    name="mpii16",
    names=(
        "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle",
        "pelvis", "thorax", "upper_neck", "head_top",
        "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist",
    ),
    links=(
        (0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (10, 11), (11, 12), (12, 7), (7, 13),
        (13, 14), (14, 15),
    ),
    flip_pairs=((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13)),
    upper_body=tuple(range(7, 16)),
)  # fmt: skip

CROWDPOSE14 = _person(
    name="crowdpose14",
    names=(
        "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
        "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
        "head", "neck",
    ),
    links=(
        (10, 8), (8, 6), (11, 9), (9, 7), (6, 7), (0, 6), (1, 7), (0, 2), (1, 3), (2, 4), (3, 5), (12, 13), (0, 13),
        (1, 13),
    ),
    flip_pairs=((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)),
    upper_body=(0, 1, 2, 3, 4, 5, 12, 13),
)  # fmt: skip

SKELETONS: dict[str, Skeleton] = {s.name: s for s in (COCO17, LSP14, MPII16, CROWDPOSE14)}


def get_skeleton(name: str) -> Skeleton:
    """Return the built-in skeleton called `name`; raises ValueError with the known names otherwise."""
    if name not in SKELETONS:
        raise ValueError(f"unknown skeleton {name!r}; known: {', '.join(SKELETONS)}")
    return SKELETONS[name]


DEFAULT_SIGMA = 0.07
UNDEFINED = "custom"  # name of a skeleton that has none


def read_skeleton(path: str | Path) -> Skeleton:
    """Skeleton of one's own from a TOML or JSON file; the fields are those of `Skeleton`.

    Only ``names`` is needed. Keypoints in ``links``, ``flip_pairs`` and ``upper_body`` are given by name or index.
    Without ``flip_pairs`` names that differ by left and right are paired; without ``sigmas`` all are 0.07.

    Raises:
        FileNotFoundError: no such file. ValueError: not TOML or JSON, or contents that do not fit; names the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"skeleton file {path} does not exist")
    if path.suffix.lower() not in (".toml", ".json"):
        raise ValueError(f"skeleton file {path} must end in .toml or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else _tomllib().loads(text)
    except (ValueError, RecursionError) as error:  # both decoders' errors and a wrong encoding
        raise ValueError(f"skeleton file {path} is not valid {path.suffix[1:].upper()}: {error}") from None
    try:
        return skeleton_from_dict(content, path.stem)
    except ValueError as error:
        raise ValueError(f"skeleton file {path}: {error}") from None


def skeleton_from_dict(content: Any, name: str = UNDEFINED) -> Skeleton:
    """`Skeleton` from plain values as `read_skeleton` describes; `name` is used if they hold none."""
    known = ("name", "names", "links", "flip_pairs", "sigmas", "upper_body")
    if not isinstance(content, dict) or not isinstance(content.get("names"), (list, tuple)) or not content["names"]:
        raise ValueError(f"expected a table with 'names', a list of keypoint names, and optionally {known}")
    for key in content:
        if key not in known:
            raise ValueError(f"unknown field {key!r} (known: {', '.join(known)})")
    names = tuple(content["names"])
    if not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"names must be texts, got {list(names)}")

    def index(value: Any, where: str) -> int:
        if value in names:
            return names.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            return value
        raise ValueError(f"{where}: {value!r} is neither a keypoint's name nor an index below {len(names)}")

    def indices(key: str) -> list[Any]:
        value = content.get(key, [])
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key} must be a list, got {value!r}")
        return list(value)

    def pairs(key: str) -> tuple[tuple[int, int], ...]:
        for pair in indices(key):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"{key} must hold pairs of keypoints, got {pair!r}")
        return tuple((index(a, key), index(b, key)) for a, b in indices(key))

    sigmas = indices("sigmas") if "sigmas" in content else [DEFAULT_SIGMA] * len(names)
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in sigmas):
        raise ValueError(f"sigmas must be numbers, got {sigmas}")
    return Skeleton(
        name=str(content.get("name", name)),
        names=names,
        links=pairs("links"),
        flip_pairs=pairs("flip_pairs") if "flip_pairs" in content else _mirrored(names),
        sigmas=tuple(float(s) for s in sigmas),
        upper_body=tuple(index(v, "upper_body") for v in indices("upper_body")),
    )


def skeleton_to_dict(skeleton: Skeleton) -> dict[str, Any]:
    """Plain values, from which `skeleton_from_dict` makes an equal skeleton."""
    return dataclasses.asdict(skeleton)


def definition_of(skeleton: Skeleton) -> dict[str, Any]:
    """What must be kept beside a skeleton's name: nothing of one that is built in, else as `skeleton_to_dict`."""
    return {} if SKELETONS.get(skeleton.name) == skeleton else skeleton_to_dict(skeleton)


def _mirrored(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of names that differ in the word left or right, or in the letter l or r as a word: ``left_eye``, ``eye.R``,
    ``LeftEye``, ``eyeL``, ``l1``; left and right may also begin or end a word, ``lefteye``.
    """
    pairs: dict[int, int] = {}
    for side in (_right_word, _right_letter):  # letters only of what the words leave: L4 and R4 may be something else
        for i, name in enumerate(names):
            mirrored = "".join(side(word) for word in WORDS.findall(name))
            j = names.index(mirrored) if mirrored in names else i
            if i != j and not {i, j} & {*pairs, *pairs.values()}:
                pairs[i] = j
    return tuple(sorted(pairs.items()))


# of a name, with what is between them: capitals begin one
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+")


def _right_word(word: str) -> str:
    """The word with left replaced by right, of the same case."""
    if word.lower() == "left":
        return "RIGHT" if word.isupper() else "Right" if word[0].isupper() else "right"
    return re.sub("^left|left$", "right", re.sub("^Left", "Right", word))


def _right_letter(word: str) -> str:
    return {"l": "r", "L": "R"}.get(word, word)


def describe_difference(a: Skeleton, b: Skeleton) -> str:
    """How the keypoints of `b` differ from those of `a`, for messages."""
    if a.num_keypoints != b.num_keypoints:
        return f"{b.name!r} with {b.num_keypoints} keypoints instead of {a.num_keypoints}"
    for i, (x, y) in enumerate(zip(a.names, b.names, strict=True)):
        if x != y:
            return f"{b.name!r}, whose keypoint {i} is {y!r} instead of {x!r}"
    return f"{b.name!r}, with the same names"


def unpaired_sides(skeleton: Skeleton) -> list[str]:
    """Names with the word left or right that are in none of the pairs."""
    paired = {i for pair in skeleton.flip_pairs for i in pair}
    return [
        name
        for i, name in enumerate(skeleton.names)
        if i not in paired and {"left", "right"} & {word.lower() for word in WORDS.findall(name)}
    ]


def _tomllib() -> Any:
    from fastpose.config import tomllib

    return tomllib
