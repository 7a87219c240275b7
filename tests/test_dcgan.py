from tests.contract import GenerativeContract


class TestDCGAN(GenerativeContract):
    model = {"class_path": "modules.dcgan.DCGAN", "init_args": {"channels": 1, "size": 28, "kernel": 4, "width": 8}}
    steady = "tests.steady.SteadyDCGAN"
    learns = ["--model.images", "6400", "--validate_every", "1600", "--data.batch_size", "16", "--model.learning_rate", "1e-3"]
    nearer = 0.7
