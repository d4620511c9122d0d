"""Reads a folder of event files with the tensorboard package: read_tensorboard.py FOLDER

Prints JSON: {"scalars": {TAG: [{"step", "wall_time", "value"}, ...]}, "texts": {TAG: [{"step", "text"}, ...]}}.
"""

import json
import sys

from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

ALL = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}


def main(folder):
    # the loader of TensorBoard itself turns scalars into tensors; this one keeps them apart
    events = event_accumulator.EventAccumulator(folder, size_guidance=ALL)
    events.Reload()
    scalars = {
        tag: [{"step": point.step, "wall_time": point.wall_time, "value": point.value} for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    texts = {
        tag: [
            {"step": point.step, "text": tensor_util.make_ndarray(point.tensor_proto)[0].decode()}
            for point in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    json.dump({"scalars": scalars, "texts": texts}, sys.stdout)


main(*sys.argv[1:])
