from tests.tasks.detection import SMALL_NETWORK, DetectionContract


class TestMaskRCNN(DetectionContract):
    model = {"class_path": "modules.mask_rcnn.MaskRCNN", "init_args": {**SMALL_NETWORK, "learning_rate": 0.01}}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicMaskRCNN"
    training_overrides = [
        "--model.optimizer",
        "adamw",
        "--model.total_images",
        "800",
        "--val_every_images",
        "200",
        "--model.learning_rate",
        "0.003",
    ]
    min_score = 30
