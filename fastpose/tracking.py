"""The same people in consecutive frames, and their keypoints without jitter.

Matching: greedy by object keypoint similarity with the person's last pose, as in B. Xiao et al., "Simple Baselines for
Human Pose Estimation and Tracking" (ECCV 2018), without optical flow. Smoothing: G. Casiez et al., "1 Euro Filter: A
Simple Speed-based Low-pass Filter for Noisy Input in Interactive Systems" (CHI 2012), in the form of its authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastpose.ops.oks_nms import oks_matrix
from fastpose.poses import Array, Poses
from fastpose.skeletons import Skeleton


@dataclass(eq=False)
class _Track:
    """A person as last seen. Arrays are [K, 2] or [K]; `smooth` and `speed` (pixels per second) are filtered."""

    number: int
    time: float
    keypoints: Array
    there: Array
    visible: Array
    area: float
    smooth: Array
    speed: Array


class Tracker:
    """Gives the people of each frame the numbers they had in the one before: call it with one frame after the other.

    Args:
        fps: frames per second.
        smooth: filter the keypoints. The filter's delay is 1 / (2 pi f) seconds for the frequency f of `cutoff` and
            `beta`: 0.1 s for a keypoint at rest, 14 ms for one that moves half a person per second.
        least_oks: a pose this similar to a person's last one, or less, is somebody else.
        patience: a person that was not in the frame before is forgotten this many seconds after the last one.
        keypoint_threshold: keypoints that score no more do not count for the similarity.
        cutoff: frequency in Hz up to which movements pass when the keypoint rests; lower is smoother.
        beta: by how many Hz that frequency rises at a speed of one person per second, the longer side of whose box is
            the unit; higher lags less.

    Raises:
        ValueError: a setting that is not a number or out of range.
    """

    def __init__(
        self,
        fps: float,
        *,
        smooth: bool = True,
        least_oks: float = 0.2,
        patience: float = 1.0,
        keypoint_threshold: float = 0.1,
        cutoff: float = 1.5,
        beta: float = 20.0,
    ) -> None:
        for name, value in (("fps", fps), ("cutoff", cutoff)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, value in (("patience", patience), ("beta", beta)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name, value in (("least_oks", least_oks), ("keypoint_threshold", keypoint_threshold)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")
        self.fps, self.smooth = fps, smooth
        self.least_oks, self.patience, self.keypoint_threshold = least_oks, patience, keypoint_threshold
        self.cutoff, self.beta = cutoff, beta
        self.time = -math.inf
        self.skeleton: Skeleton | None = None
        self.tracks: list[_Track] = []
        self.people = 0  # so far

    def __call__(self, poses: Poses, time: float | None = None) -> Poses:
        """The poses with `track_ids`, which count from 1, and keypoints smoothed; in the same order.

        A pose without any keypoint that scores more than `keypoint_threshold` is nobody: it gets the number 0.

        time: of the frame in seconds; by default 1 / fps after the one before.

        Raises:
            ValueError: `time` is not after that of the frame before; poses of another skeleton.
        """
        if time is None:
            time = 0.0 if self.time == -math.inf else self.time + 1 / self.fps
        if not self.time < time < math.inf:
            raise ValueError(f"frames must come in order: {time} s after {self.time} s")
        if self.skeleton not in (None, poses.skeleton):
            raise ValueError(f"the poses before had skeleton {self.skeleton.name}, now it is {poses.skeleton.name}")
        since = time - self.patience - 0.5 / self.fps  # half a frame for rounding
        self.tracks = [t for t in self.tracks if t.time == self.time or t.time >= since]
        self.time, self.skeleton = time, poses.skeleton
        there = np.isfinite(poses.keypoints).all(2) & (poses.keypoint_scores > 0)
        visible = there & (poses.keypoint_scores > self.keypoint_threshold)
        sides = np.maximum(poses.boxes[:, 2:] - poses.boxes[:, :2], 0)
        known = self._match(poses, visible, sides.prod(1))
        keypoints, numbers = poses.keypoints.copy(), np.zeros(len(poses), np.int64)
        for i in range(len(poses)):
            track = known.get(i)
            if not visible[i].any():
                continue
            if track is None:
                self.people += 1
                new, none = keypoints[i].copy(), np.zeros_like(there[i])
                track = _Track(self.people, time, new, none, none, 0.0, new, np.zeros_like(new))
                self.tracks.append(track)
            self._update(track, keypoints[i].copy(), there[i], float(sides[i].max()))
            track.visible, track.area = visible[i], float(sides[i].prod())
            numbers[i] = track.number
            if self.smooth:
                keypoints[i] = track.smooth
        return replace(poses, keypoints=keypoints, track_ids=numbers)

    def _match(self, poses: Poses, visible: Array, areas: Array) -> dict[int, _Track]:
        """The person that each pose is of; poses of nobody known are left out."""
        n = len(self.tracks)
        if not n or not len(poses):
            return {}
        before = np.stack([np.where(t.visible[:, None], t.keypoints, 0) for t in self.tracks])
        points = np.concatenate([before, np.where(visible[..., None], poses.keypoints, 0)])
        similarity = oks_matrix(
            torch.from_numpy(points),
            torch.from_numpy(np.concatenate([np.stack([t.visible for t in self.tracks]), visible])),
            torch.from_numpy(np.concatenate([np.array([t.area for t in self.tracks], np.float32), areas])),
            torch.tensor(poses.skeleton.sigmas),
        ).numpy()[:n, n:]
        matched: dict[int, _Track] = {}
        free = set(range(n))
        for flat in np.argsort(-similarity, axis=None, kind="stable"):
            j, i = divmod(int(flat), len(poses))
            if not similarity[j, i] > self.least_oks:
                break
            if j in free and i not in matched:
                matched[i] = self.tracks[j]
                free.remove(j)
        return matched

    def _update(self, track: _Track, keypoints: Array, there: Array, size: float) -> None:
        """Go on with a new pose; keypoints that were not there before start anew."""
        step = self.time - track.time
        again = (there & track.there)[:, None]
        speed = (keypoints - track.keypoints) / step if step > 0 else np.zeros_like(keypoints)
        speed = track.speed + _gain(1.0, step) * (speed - track.speed)
        gain = _gain(self.cutoff + self.beta * np.abs(speed) / max(size, 1.0), step)
        track.smooth = np.where(again, track.smooth + gain * (keypoints - track.smooth), keypoints).astype(np.float32)
        track.speed = np.where(again, speed, 0.0)
        track.keypoints, track.there, track.time = keypoints, there, self.time


def _gain(cutoff: Array | float, step: float) -> Array:
    """Of a first-order low-pass filter with a frequency in Hz, after `step` seconds."""
    turns = 2 * math.pi * step * np.asarray(cutoff)
    return turns / (1 + turns)


def track(results: Iterable[Poses | ValueError], fps: float, **settings: Any) -> Iterator[Poses | ValueError]:
    """What `PoseEstimator.stream` gives for consecutive frames, its poses through a `Tracker` with `settings`.

    The errors of frames that cannot be used are passed on.

    Raises:
        ValueError: settings, see `Tracker`. TypeError: something that is neither poses nor an error, such as images.
    """
    return _track(results, Tracker(fps, **settings))


def _track(results: Iterable[Poses | ValueError], tracker: Tracker) -> Iterator[Poses | ValueError]:
    for number, result in enumerate(results):
        if isinstance(result, Poses):
            yield tracker(result, number / tracker.fps)
        elif isinstance(result, ValueError):
            yield result
        else:
            raise TypeError(f"track takes the results of PoseEstimator.stream, got {type(result).__name__}")
