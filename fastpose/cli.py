"""The command line: ``fastpose predict | train | evaluate | validate-data | export | models | info``.

Exit codes: 0 all done, 2 bad input (what could be done was done), 1 anything unexpected.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from fastpose.boxes import BoxesOfImage

BAD_INPUT = 2
NETWORK = "network (default: that of the weights, of the default weights mobileposenet)"
SAVE_AFTER = 600.0  # seconds of estimating that a kill loses at most
DRAWN_BEHIND = 4  # pictures that are being written while the next poses are found
# what the numbers of an evaluation depend on
EVALUATION_SETTINGS = (
    "dataset", "data", "split", "annotations", "images", "skeleton", "limit", "metric", "predictions", "evaluator",
)  # fmt: skip
# and without --predictions
NETWORK_SETTINGS = (
    "model", "weights", "boxes", "least_score", "codec", "input_size", "padding", "no_flip_shift", "nms",
    "nms_threshold", "keypoint_threshold", "flip_test", "precision",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command == "train" and all("=" in text and text[0] != "-" for text in rest):
        options.settings += rest  # those behind an option, which argparse does not join to those before
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments is None:  # as a program; file names need not be UTF-8: what is not becomes question marks
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
    try:
        return int(options.run(options))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        hint = ""
        if isinstance(error, ImportError) and re.search(r"lib(GL|glib|gthread)\b.*\.so", str(error)):
            hint = "; OpenCV needs it: on Debian and Ubuntu, apt-get install libgl1 libglib2.0-0"
        print(f"fastpose: error: {error}{hint}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("fastpose: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fastpose.data import METRICS
    from fastpose.ops.oks_nms import METHODS
    from fastpose.plan import PRECISIONS
    from fastpose.scoring import EVALUATORS

    parser = argparse.ArgumentParser(prog="fastpose", description="Small and fast human pose estimation.")
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("predict", help="find people's keypoints in images and videos")
    p.add_argument("sources", nargs="+", metavar="SOURCE", help="image, video, folder of images or glob pattern")
    p.add_argument("--model", default="auto", help=NETWORK)
    p.add_argument("--weights", default="default", help="'default' or a weights file (default: %(default)s)")
    p.add_argument(
        "--skeleton", help="the keypoints, for weights of others that do not tell: lsp14 or a .toml or .json file"
    )
    _add_preparation_arguments(p)
    p.add_argument("--boxes", metavar="FILE", help="JSON with person boxes by file name; instead of a detector")
    p.add_argument(
        "--detector",
        default="auto",
        choices=("auto", "hog", "none"),
        help="hog: OpenCV's people detector; none: each image is one person; auto: whichever fits better",
    )
    p.add_argument("--output", metavar="DIR", default="poses", help="folder for results (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="results file (default: DIR/poses.json)")
    p.add_argument(
        "--save-images", action="store_true", help="write drawn images and videos too (a single one always is)"
    )
    p.add_argument("--threshold", type=float, default=0.25, help="least keypoint score to draw (default: %(default)s)")
    p.add_argument("--track", action="store_true", help="number the people of a video, the same in all its frames")
    p.add_argument("--smooth", action="store_true", help="track, and take the jitter from their keypoints")
    p.add_argument("--batch-size", type=int, default=32, help="crops per forward pass (default: %(default)s)")
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="bfloat16, int8: less exact, faster on some CPUs",
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    _add_flip_argument(p, "average with the mirrored crop: half as fast; default: as the weights recommend")
    p.add_argument("--quiet", action="store_true", help="print errors only")
    p.set_defaults(run=_predict)

    p = commands.add_parser("train", help="train a network")
    p.add_argument(
        "--config", metavar="FILE", help="recipe: a TOML file, the name of a shipped one, or config.json of a run"
    )
    p.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the recipe's")
    p.set_defaults(run=_train)

    p = commands.add_parser(
        "evaluate", help="accuracy of weights on a data set: PCK@0.2, PCKh or AP, as is usual for it"
    )
    _add_data_arguments(p, "lspet")
    p.add_argument("--model", default="auto", help=NETWORK)
    p.add_argument("--weights", default="default", help="'default' or a weights file (default: %(default)s)")
    _add_preparation_arguments(p)
    p.add_argument("--predictions", metavar="FILE", help="score this file of results in COCO's format; runs no network")
    p.add_argument("--metric", choices=METRICS, help="instead of the data set's own")
    p.add_argument("--boxes", metavar="FILE", help="a detector's boxes in COCO's format (default: the annotated ones)")
    p.add_argument("--least-score", type=float, default=0.0, help="of a detector's boxes to use (default: %(default)s)")
    p.add_argument("--nms", choices=(*METHODS, "none"), default="hard", help="OKS-NMS for AP (default: %(default)s)")
    p.add_argument("--nms-threshold", type=float, help="of the OKS-NMS (default: 0.9 for hard, 0 otherwise)")
    p.add_argument(
        "--keypoint-threshold", type=float, default=0.2, help="least keypoint score to count in a pose's (default: 0.2)"
    )
    p.add_argument("--evaluator", choices=EVALUATORS, default="fastpose", help="whose code computes AP; same numbers")
    _add_flip_argument(p, "average with the mirrored crop; default: as the weights recommend")
    p.add_argument("--batch-size", type=int, default=32, help="crops per forward pass (default: %(default)s)")
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="bfloat16, int8: less exact, faster on some CPUs",
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--results", metavar="FILE", help="write the poses as COCO's submission format")
    p.add_argument("--json", metavar="FILE", help="write the numbers as JSON")
    p.add_argument("--worst", metavar="FILE", help="draw the people whose poses fit worst, e.g. worst.png")
    p.add_argument("--worst-count", type=int, default=24, help="how many people to draw (default: %(default)s)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_evaluate)

    p = commands.add_parser("validate-data", help="find what is wrong with a data set; exit code 2 if anything is")
    _add_data_arguments(p)
    p.add_argument("--no-images", action="store_true", help="check the annotations only, do not decode the images")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_validate_data)

    p = commands.add_parser("export", help="write a network for deployment")
    p.add_argument(
        "--format",
        choices=("torchscript", "onnx", "safetensors"),
        default="torchscript",
        help="a program (default: torchscript), or the weights in 16 bits with what must be known about them",
    )
    p.add_argument("--bits", type=int, choices=(8, 16), help="of safetensors (default: 16); 8: dense convolutions only")
    p.add_argument("--model", default="auto", help=NETWORK)
    p.add_argument("--weights", default="default")
    p.add_argument("--fused", action="store_true", help="use fastpose's kernels; the file then needs fastpose to load")
    p.add_argument("--precision", choices=PRECISIONS, default="float32", help="of --fused (default: %(default)s)")
    p.add_argument(
        "--keypoints",
        action="store_true",
        help="a program from crops (uint8 RGB [B, 3, h, w]) to keypoints and scores, instead of to heatmaps",
    )
    _add_preparation_arguments(p)
    p.add_argument("--skeleton", help="of safetensors: the keypoints, likewise; lsp14 or a .toml or .json file")
    _add_flip_argument(p, "of safetensors: what the file recommends; default: what it did before")
    p.add_argument("output", metavar="FILE", help="e.g. mobileposenet.pt")
    p.set_defaults(run=_export)

    p = commands.add_parser("models", help="the networks: our own counts beside the published figures")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.set_defaults(run=_models)

    p = commands.add_parser("info", help="versions, processor, and which kernels are used")
    p.add_argument("--model", metavar="NAME", help="whether this network can be optimised, and if not, why")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.set_defaults(run=_info)
    return parser


def _add_data_arguments(p: argparse.ArgumentParser, default: str | None = None) -> None:
    """Arguments that say which part of which data set is meant; read by `_load_data`."""
    from fastpose.data import DATASETS

    p.add_argument("data", metavar="DIR", help="folder of the unpacked data set")
    what = f"default: {default}" if default else "required"
    p.add_argument("--dataset", choices=DATASETS, default=default, required=default is None, help=f"its kind ({what})")
    p.add_argument("--split", default="val", help="train, val, test, ... (default: %(default)s)")
    p.add_argument("--annotations", metavar="FILE", help="annotation file, if not at its usual place")
    p.add_argument("--images", metavar="DIR", help="image folder, if not at its usual place")
    p.add_argument("--skeleton", metavar="FILE", help="custom: .toml or .json file, or the name of a built-in skeleton")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N images")


def _add_preparation_arguments(p: argparse.ArgumentParser) -> None:
    """Arguments for what a file of weights may not tell; read by `_preparation`."""
    p.add_argument("--codec", help="softmax, msra, dark or udp, for weights of others that do not tell")
    p.add_argument(
        "--input-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the crops or images, likewise"
    )
    p.add_argument(
        "--no-flip-shift",
        action="store_true",
        help="with --codec: do not move mirrored heatmaps (of msra and dark)",
    )
    p.add_argument("--padding", type=float, help="crop side in units of the box's, likewise")


def _add_flip_argument(p: argparse.ArgumentParser, help: str) -> None:
    p.add_argument("--flip-test", action=argparse.BooleanOptionalAction, default=None, help=help)


def _preparation(options: argparse.Namespace) -> dict[str, Any]:
    from fastpose.codecs import HeatmapCodec, get_codec

    codec = get_codec(options.codec) if options.codec else None
    if options.no_flip_shift:
        if not isinstance(codec, HeatmapCodec):
            raise ValueError(f"--no-flip-shift needs --codec softmax, msra, dark or udp, got {options.codec}")
        codec = dataclasses.replace(codec, flip_shift=0)
    size = tuple(options.input_size) if options.input_size else None
    return {"codec": codec, "input_size": size, "padding": options.padding}


def _load_data(options: argparse.Namespace, **more: Any) -> Any:
    from fastpose.data import load_dataset

    return load_dataset(
        options.dataset,
        options.data,
        options.split,
        skeleton=options.skeleton,
        annotations=options.annotations,
        images=options.images,
        limit=options.limit,
        **more,
    )


def _predict(options: argparse.Namespace) -> int:
    from fastpose.boxes import boxes_for, read_boxes
    from fastpose.data.datasets import find_skeleton
    from fastpose.files import check_writable, is_replaceable, write_json
    from fastpose.images import find_images
    from fastpose.pipeline import PoseEstimator
    from fastpose.predict import Drawings, File, estimate_files
    from fastpose.stream import run_ahead
    from fastpose.tracking import Tracker
    from fastpose.video import SUFFIXES, Video

    errors: list[dict[str, str]] = []

    def report(name: object, error: object) -> None:
        errors.append({"file": str(name), "error": str(error)})
        tqdm.write(f"fastpose: error: {error}", file=sys.stderr)

    paths: list[Path] = []
    for source in options.sources:
        try:
            paths += find_images(source)
        except (ValueError, OSError) as error:  # a folder may be forbidden
            report(source, error)
    files: list[File] = []
    boxes: list[BoxesOfImage] | None = [] if options.boxes else None
    by_name = read_boxes(options.boxes) if options.boxes else {}
    namesakes: dict[str, list[Path]] = {}
    for path in dict.fromkeys(paths):
        namesakes.setdefault(path.name, []).append(path)
    for path in dict.fromkeys(paths):
        try:
            is_video = path.suffix.lower() in SUFFIXES
            if boxes is not None:
                if is_video:
                    raise ValueError(f"{path}: a video cannot have --boxes, which are those of images")
                known = boxes_for(by_name, path, namesakes[path.name])
                if known is None:
                    raise ValueError(f"{path}: not in {options.boxes}")
                boxes.append(known)
            files.append(Video(path) if is_video else path)
        except ValueError as error:
            report(path, error)
    track = options.track or options.smooth
    if track and files and not any(isinstance(file, Video) for file in files):
        raise ValueError("--track and --smooth are for videos, of which there is none here")
    save_images = options.save_images or len(files) == 1
    estimator = PoseEstimator(
        options.model,
        options.weights,
        detector="none" if options.boxes else options.detector,
        device=options.device,
        batch_size=options.batch_size,
        precision=options.precision,
        flip_test=options.flip_test,
        skeleton=None if options.skeleton is None else find_skeleton(options.skeleton),
        **_preparation(options),
    )
    options.model = estimator.model_name
    if estimator.notice and files and not options.quiet:
        print(f"fastpose: {estimator.notice}", file=sys.stderr)

    inputs = len(files) + len(errors)
    output = Path(options.output)
    json_path = Path(options.json) if options.json else output / "poses.json"
    output.mkdir(parents=True, exist_ok=True)  # now: hours of work may lie before the first file
    check_writable(json_path)
    result = _coco_frame(options, estimator.skeleton, errors)
    expected = sum(max(file.count, 1) if isinstance(file, Video) else 1 for file in files)
    tell = not options.quiet and len(files) < 20
    of_video = 0  # poses so far
    saved = time.time() if is_replaceable(json_path) else math.inf

    def save_incomplete() -> None:
        write_json(json_path, {**result, "info": {**result["info"], "incomplete": True}})

    try:
        with (
            tqdm(total=expected, unit="image", disable=options.quiet or expected < 20) as progress,
            Drawings(output, files, options.threshold, report) as drawings,
        ):
            make_tracker = partial(Tracker, smooth=options.smooth) if track else None
            everything = estimate_files(estimator, files, boxes, report, progress.update, make_tracker)
            for found in run_ahead(drawings.draw, everything, DRAWN_BEHIND) if save_images else everything:
                if time.time() - saved > SAVE_AFTER:
                    save_incomplete()
                    saved = time.time()
                if found.poses is None:
                    if tell:
                        tqdm.write(f"{found.path}: {found.frame} frames, {of_video} poses")
                    of_video = 0
                    continue
                height, width = found.poses.image_size
                number, people = len(result["images"]) + 1, len(found.poses)
                image = {"id": number, "file_name": str(found.path), "width": width, "height": height}
                result["images"].append(image if found.frame is None else {**image, "frame": found.frame})
                for annotation in found.poses.to_coco(number):
                    x, y, box_width, box_height = annotation["bbox"]
                    more = {"area": round(box_width * box_height, 3), "iscrowd": 0}
                    more["num_keypoints"] = sum(score > 0 for score in annotation["keypoints"][2::3])
                    result["annotations"].append({"id": len(result["annotations"]) + 1, **annotation, **more})
                if found.frame is not None:
                    of_video += people
                elif tell:
                    best = f", best score {found.poses.scores.max():.2f}" if people else ""
                    tqdm.write(f"{found.path}: {people} {'person' if people == 1 else 'people'}{best}")
    except BaseException:  # what is done is not lost
        if result["images"]:
            save_incomplete()
        raise

    if result["images"] or not errors:
        write_json(json_path, result)
        if not options.quiet:
            drawn = f", drawn in {output}/" if save_images else ""
            print(f"{len(result['annotations'])} poses in {len(result['images'])} images -> {json_path}{drawn}")
    if errors:
        print(f"fastpose: {len(errors)} of {inputs} inputs failed", file=sys.stderr)
        return BAD_INPUT
    return 0


def _coco_frame(options: argparse.Namespace, skeleton: Any, errors: list[dict[str, str]]) -> dict[str, Any]:
    """A file in COCO's format without images and poses."""
    category = {
        "id": 1,
        "name": "person",
        "keypoints": list(skeleton.names),
        "skeleton": [[a + 1, b + 1] for a, b in skeleton.links],
    }
    info = {"model": options.model, "weights": str(options.weights)}
    return {"info": info, "images": [], "annotations": [], "categories": [category], "errors": errors}


def _train(options: argparse.Namespace) -> int:
    from importlib import resources

    from fastpose.config import read_config
    from fastpose.train import TrainConfig, train

    config_path = options.config
    if config_path and not Path(config_path).is_file():
        shipped = resources.files("fastpose.recipes").joinpath(f"{config_path}.toml")
        if shipped.is_file():
            config_path = str(shipped)
    config = read_config(TrainConfig, config_path, options.settings)
    best = train(config, options.resume, options.quiet)
    if os.environ.get("RANK", "0") != "0":  # of the processes of torchrun one tells
        return 0
    print(f"best validation {config.measure}: {best:.1f}")
    print(f"weights: {Path(config.output) / 'best.safetensors'}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from fastpose.distributed import choose_device, process_group

    device = choose_device(options.device)
    with process_group(device):  # one process, or those of torchrun
        return _evaluate_on(device, options)


def _evaluate_on(device: Any, options: argparse.Namespace) -> int:
    from fastpose.checkpoints import is_fastpose, resolve_weights
    from fastpose.data import MISSING, UNREADABLE
    from fastpose.data.coco import NO_DETECTION, NO_RESULT
    from fastpose.data.datasets import IN_COCO_FORMAT
    from fastpose.distributed import rank
    from fastpose.evaluate import Evaluation, evaluate, to_text
    from fastpose.files import write_json
    from fastpose.models import is_bottom_up
    from fastpose.pipeline import PoseEstimator

    more: dict[str, Any] = {"metric": options.metric}
    if options.boxes:
        more |= {"detections": options.boxes, "least_score": options.least_score}
    if options.predictions:
        if options.dataset not in IN_COCO_FORMAT:
            known = ", ".join(IN_COCO_FORMAT)
            raise ValueError(
                f"--predictions needs annotations in COCO's format: --dataset must be one of {known}, "
                f"got {options.dataset!r}"
            )
        result = Evaluation.of_results(
            _load_data(options, keep_missing=True, **more), options.predictions, options.evaluator
        )
    else:
        data = _load_data(options, **more)
        if options.results and data.metric != "AP":  # now, not when everything else is done
            raise ValueError(f"--results: only AP has results in COCO's format, the metric here is {data.metric}")
        _check_outputs(options)
        others = not is_fastpose(resolve_weights(options.weights, options.model))
        estimator = PoseEstimator(
            options.model,
            options.weights,
            detector="none",
            device=device,
            batch_size=options.batch_size,
            precision=options.precision,
            flip_test=options.flip_test,
            skeleton=data.skeleton if others else None,  # others' files do not say
            **_preparation(options),
        )
        options.model, options.flip_test = estimator.model_name, estimator.flip_test
        result = evaluate(
            estimator,
            data,
            nms=options.nms,
            nms_threshold=options.nms_threshold,
            keypoint_threshold=options.keypoint_threshold,
            evaluator=options.evaluator,
            quiet=options.quiet,
            share=True,
        )
    costly = (NO_RESULT,) if options.predictions else (NO_DETECTION, MISSING, UNREADABLE)
    lost = any(kind in result.report.findings for kind in costly)
    code = BAD_INPUT if lost or result.score.people == 0 else 0
    if rank() > 0:  # every process has the result, one is enough to tell
        return code
    print(to_text(result.score))
    if not options.predictions:
        if result.score.metric == "AP" and not is_bottom_up(estimator.model_name):
            print(f"boxes: {options.boxes or 'annotated'}")
        print(f"flip test: {'yes' if options.flip_test else 'no'}")
    names = EVALUATION_SETTINGS + (() if options.predictions else NETWORK_SETTINGS)
    settings = {name: getattr(options, name) for name in names}
    if not options.predictions:
        settings["precision"] = estimator.precision  # what "auto" was
    for path, write in (
        (options.results, result.write_results),
        (options.json, lambda path: write_json(path, {**result.to_dict(), "settings": settings})),
        (options.worst, lambda path: result.write_worst(path, options.worst_count)),
    ):
        try:
            if path:
                write(path)
        except (OSError, ValueError) as error:  # the others are written
            print(f"fastpose: error: {error}", file=sys.stderr)
            code = BAD_INPUT
    # what is left out of a file of boxes or results, though nothing is wrong with it, makes another number too
    told = result.report.to_text(wrong_only=not (options.boxes or options.predictions))
    if told:
        print(f"fastpose: in the data:\n{told}", file=sys.stderr)
    if result.score.people == 0:
        print("fastpose: error: nobody could be measured", file=sys.stderr)
    return code


def _check_outputs(options: argparse.Namespace) -> None:
    """Raise for files that could not be written, before the work."""
    from fastpose.files import check_writable
    from fastpose.images import check_suffix

    for path in (options.results, options.json, options.worst):
        if path:
            check_writable(path)
    if options.worst:
        check_suffix(options.worst)
        if options.worst_count < 1:
            raise ValueError(f"--worst-count must be at least 1, got {options.worst_count}")


def _validate_data(options: argparse.Namespace) -> int:
    from fastpose.data.validate import validate_data

    data = _load_data(options)
    report = validate_data(data, not options.no_images, options.quiet or options.json)
    images, people = len(data.image_files()), len(data)
    if options.json:
        content = {"dataset": options.dataset, "split": options.split, "images": images, "people": people}
        content |= {"wrong": report.wrong, "findings": report.to_dict()}
        print(json.dumps(content, indent=1))
    else:
        print(f"{options.dataset} {options.split}: {images} images, {people} people, {report.wrong} things wrong")
        if report.findings:
            print(report.to_text(examples=10))
    return BAD_INPUT if report.wrong else 0


def _export(options: argparse.Namespace) -> int:
    from fastpose.checkpoints import USUAL_PADDING, codec_of, describe_weights, find_architecture
    from fastpose.codecs import HeatmapCodec, get_codec
    from fastpose.data.datasets import find_skeleton
    from fastpose.export import ExportError, export_onnx, export_torchscript, export_weights
    from fastpose.files import check_writable
    from fastpose.models._registry import check_codec, create_from, is_bottom_up, model_entry, read_weights
    from fastpose.pipeline import with_settings
    from fastpose.plan import PLAIN

    checkpoint = read_weights(options.weights, options.model)
    model, info = create_from(checkpoint, options.model), checkpoint.info()
    check_writable(options.output)
    if options.format == "safetensors":
        for name in ("fused", "keypoints"):
            if getattr(options, name):
                raise ValueError(f"--{name} is about programs, not weights")
        if options.precision not in PLAIN:
            raise ValueError("--precision is about programs, not weights: choose where they are used")
        settings = ("codec", "input_size", "padding", "skeleton")
        given = [name for name in settings if getattr(options, name) is not None]
        if info is not None and given:
            option = "--" + given[0].replace("_", "-")
            raise ValueError(f"{option}: {checkpoint.path} has its own, which can be changed where it is used only")
        skeleton = find_skeleton(options.skeleton) if options.skeleton else None
        described = describe_weights(checkpoint, options.model, skeleton)
        described, _ = with_settings(described, model, skeleton, **_preparation(options), flip_test=options.flip_test)
        bits = options.bits or 16
        export_weights(model, options.output, described, bits)
        print(f"{options.output}: weights of {bits} bits for create_model and PoseEstimator")
        return 0
    for name in ("bits", "skeleton", "padding", "no_flip_shift"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is about weights: --format safetensors")
    if options.flip_test is not None:
        raise ValueError("--flip-test is about weights: --format safetensors")
    if options.codec and not options.keypoints:
        raise ValueError("--codec is about --keypoints")
    if options.precision not in PLAIN and not options.fused:
        raise ValueError("--precision is about --fused: the other files are computed in float32")
    name, _, _ = find_architecture(checkpoint, options.model)
    size = model_entry(name).input_size if info is None else info.input_size
    height, width = size = tuple(options.input_size or size)
    multiple = int(getattr(model, "input_multiple", 1))
    if any(side < 1 or side % multiple for side in size):
        raise ValueError(f"--input-size: {name} takes positive multiples of {multiple}, got {height} {width}")
    codec: HeatmapCodec | None = None
    if options.keypoints:
        used = get_codec(options.codec) if options.codec else codec_of(checkpoint, name)
        check_codec(name, used)
        if is_bottom_up(name) or not isinstance(used, HeatmapCodec):
            raise ValueError(f"--keypoints: {name} is bottom-up; grouping keypoints into people cannot be exported")
        codec = used
    try:
        if options.format == "onnx":
            if options.fused:
                raise ValueError("--fused is about TorchScript: other runtimes do not know fastpose's kernels")
            print("PyTorch's ONNX exporter takes its time; for le_hrnet minutes", file=sys.stderr, flush=True)
            worst = export_onnx(model, options.output, size, codec)
            needs = f"any batch of {height}x{width}, compared by ONNX Runtime"
        else:
            worst = export_torchscript(model, options.output, size, options.fused, codec, options.precision)
            needs = "loads after `import fastpose`" if options.fused else "loads with torch alone"
    except ExportError as error:
        print(f"fastpose: error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {needs}; largest difference {worst:.1e} of the maximum")
    if codec is not None:
        padding = USUAL_PADDING if info is None else info.padding
        print(
            f"  uint8 RGB crops [B, 3, {height}, {width}] -> keypoints [B, K, 2] in crop pixels, scores [B, K]\n"
            f"  a crop as it was trained with: fastpose.geometry.crop_matrix(box, {(height, width)}, {padding:g}, "
            f'convention="{codec.convention}")'
        )
    return 0


def _models(options: argparse.Namespace) -> int:
    from fastpose.zoo import collect_models, models_table

    rows = collect_models()
    print(json.dumps(rows, indent=1) if options.json else models_table(rows))
    return 0


def _info(options: argparse.Namespace) -> int:
    from fastpose.info import collect, collect_model, to_text

    report = collect_model(options.model) if options.model else collect()
    print(json.dumps(report, indent=1) if options.json else to_text(report))
    return 0
