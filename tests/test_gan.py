from tests.contract import GenerativeContract


class TestGAN(GenerativeContract):
    model = {"class_path": "modules.gan.GAN", "init_args": {"width": 60}}
    steady = "tests.steady.SteadyGAN"
    learns = ["--model.images", "24000", "--validate_every", "6000", "--data.batch_size", "20"]
    nearer = 0.7
