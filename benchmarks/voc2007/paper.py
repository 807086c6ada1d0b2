"""The paper's own figures: Tables 1 and 2 of Wu et al. 2019 (ResNet-101 in Caffe, VOC2007)."""

from __future__ import annotations

CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]

_ROWS = {
    "baseline-hr": """
        97.6 92.7 89.2 85.8 90.6 87.5 96.2 94.3 81.4 83.3
        80.0 86.9 84.2 90.0 95.4 95.0 88.3 71.6 96.0 95.9""",
    "baseline-lr": """
        87.5 84.8 77.5 77.4 80.4 76.5 90.6 72.1 75.1 72.9
        69.5 65.0 71.7 73.9 92.8 90.8 78.3 48.6 83.3 92.3""",
    "nearest": """
        89.1 86.5 80.1 78.1 79.6 77.4 92.4 75.4 79.4 73.2
        72.5 68.5 74.0 77.1 95.0 91.9 77.6 53.4 86.1 92.5""",
}

TABLE1 = {row: [float(value) for value in text.split()] for row, text in _ROWS.items()}
"""AP in % of each class, by row, in the order of `CLASSES`."""

TABLE1_MAP = {"baseline-hr": 89.1, "baseline-lr": 78.1, "nearest": 80.0}
"""mAP in % by row, as the paper prints it."""

TABLE2 = {
    20: {256: 70.4, 512: 74.1, 1024: 77.1, 2048: 78.6, 4096: 80.0},
    100: {256: 71.8, 512: 75.2, 1024: 76.8, 2048: 78.9, 4096: 80.0},
    200: {256: 72.7, 512: 74.6, 1024: 77.1, 2048: 78.8, 4096: 80.0},
    500: {256: 71.7, 512: 74.3, 1024: 76.6, 2048: 78.4, 4096: 79.5},
    1000: {256: 71.3, 512: 74.3, 1024: 76.2, 2048: 78.3, 4096: 79.3},
    2048: {256: 71.8, 512: 73.9, 1024: 76.5, 2048: 78.3, 4096: 79.4},
}
"""mAP in % by N2 = k and N1."""
