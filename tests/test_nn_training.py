"""Training: it learns, it is reproducible, callbacks do what they say."""

import csv
import math
import re
import sys

import numpy as np
import pytest
from support import normal, rng

import fastconv
from fastconv import nn


def points(n=200, seed="points"):
    """Two classes of points that a linear layer tells apart."""
    x = normal(seed, shape=(n, 4), dtype="float32")
    return x, (x.sum(axis=1) > 0).astype(np.int64)


def linear(seed=0, width=2):
    return nn.Sequential(nn.Linear(4, width, rng=seed))


def quick(model=None, x=None, y=None, lr=0.1, **how):
    """Fit on points without a word; return (model, history)."""
    model = linear() if model is None else model
    a, b = points()
    how = {"verbose": 0, "epochs": 3, "seed": 0, **how}
    optimizer = nn.SGD(model.parameters(), lr=lr)
    return model, nn.fit(model, a if x is None else x, b if y is None else y, optimizer=optimizer, **how)


class Recorder(nn.Callback):
    def __init__(self):
        self.calls = []

    def on_train_begin(self):
        self.calls.append("train begin")

    def on_train_end(self):
        self.calls.append("train end")

    def on_epoch_begin(self, epoch):
        self.calls.append(f"epoch {epoch} begin")

    def on_batch_end(self, batch, logs):
        self.calls.append(f"batch {batch}")

    def on_epoch_end(self, epoch, logs):
        self.calls.append(f"epoch {epoch} end {' '.join(logs)}")


class Fake(nn.Callback):
    """Overwrite a number of the logs, epoch by epoch."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def on_epoch_end(self, epoch, logs):
        logs[self.name] = self.values[epoch]


# --- fit, evaluate, predict ---


def test_a_convolutional_network_learns_drawn_digits_in_seconds():
    nn.manual_seed(0)
    x, y = nn.datasets.synthetic_digits(900, seed=1)
    images = x[:, None].astype(np.float32) / 255
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, activation="relu"), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 36, 10)
    )  # fmt: skip
    history = nn.fit(
        model, images[:700], y[:700], optimizer=nn.Adam(model.parameters(), lr=0.01), metrics=["accuracy"],
        batch_size=32, epochs=5, verbose=0, validation_data=(images[700:], y[700:]),
    )  # fmt: skip
    assert history.history["val_accuracy"][-1] > 0.9
    assert history.history["loss"][-1] < history.history["loss"][0] / 2
    assert nn.predict(model, images[:3]).argmax(axis=1).tolist() == y[:3].tolist()


def test_training_is_a_loop_of_forward_backward_and_step():
    x, y = points(20)
    model, _ = quick(x=x, y=y, batch_size=8, epochs=2, shuffle=False)
    mine = linear()
    optimizer, loss = nn.SGD(mine.parameters(), lr=0.1), nn.CrossEntropyLoss()
    for _ in range(2):
        for start in range(0, 20, 8):
            mine.zero_grad()
            loss(mine(x[start : start + 8]), y[start : start + 8])
            mine.backward(loss.backward())
            optimizer.step()
    for a, b in zip(model.parameters(), mine.parameters()):
        np.testing.assert_array_equal(a.data, b.data)


def test_identical_seeds_give_identical_runs_bit_by_bit():
    def run(seed):
        nn.manual_seed(seed)
        model = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.Dropout(0.3), nn.Flatten(), nn.Linear(12, 2))
        x, y = points(64)
        optimizer = nn.Adam(model.parameters())
        history = nn.fit(model, x[:, None], y, optimizer=optimizer, epochs=2, verbose=0)
        return history.history["loss"], model.state_dict()

    (losses, state), (again, same), (other, _) = run(1), run(1), run(2)
    assert losses == again
    assert losses != other
    for name, array in state.items():
        np.testing.assert_array_equal(array, same[name])


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_seed():
    seen = []

    class Spy(nn.Identity):
        def forward(self, x):
            seen.append(x[:, 0].copy())
            return x

    x = np.arange(10, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    y = np.zeros(10, np.int64)
    for seed in (0, 0, 1):
        quick(nn.Sequential(Spy(), nn.Linear(4, 2, rng=0)), x, y, batch_size=4, epochs=1, lr=0.0, seed=seed)
    orders = [np.concatenate(seen[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert [len(batch) for batch in seen[:3]] == [4, 4, 2]


def test_history_holds_means_over_samples_and_goes_on():
    x, y = points(30)
    model = linear()
    trainer = nn.Trainer(model, nn.SGD(model.parameters(), lr=0.0), metrics=["accuracy"])
    trainer.fit(x, y, batch_size=8, epochs=2, verbose=0, validation_split=0.2)
    history = trainer.fit(x, y, epochs=1, verbose=0)
    expected = nn.evaluate(model, x[:24], y[:24], metrics="accuracy")
    assert history.epoch == [0, 1, 2]
    assert history.history["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    assert history.history["accuracy"][0] == pytest.approx(expected["accuracy"])
    assert history.history["val_loss"] == pytest.approx([trainer.evaluate(x[24:], y[24:])["loss"]] * 2)
    assert history.history["learning_rate"] == [0.0] * 3
    assert len(history.seconds) == len(history.images_per_second) == 3


def test_a_prediction_needs_an_array():
    with pytest.raises(fastconv.ArgumentTypeError, match="x must be a NumPy array, not list"):
        nn.predict(linear(), [[1.0] * 4])


def test_evaluation_and_prediction_use_evaluation_mode_and_put_modes_back():
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[2].eval()
    x, y = points(20)
    before = model.state_dict()
    first = nn.predict(model, x, batch_size=7)
    np.testing.assert_array_equal(first, nn.predict(model, x, batch_size=7))
    np.testing.assert_allclose(first, nn.predict(model, x), rtol=1e-5)
    nn.evaluate(model, x, y)
    assert [m.training for m in model] == [True, True, False]
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert nn.predict(model, x[:0]).shape == (0, 2)


def test_integer_images_are_converted_to_the_models_dtype():
    model = linear()
    x = rng("bytes").integers(0, 255, (6, 4)).astype(np.uint8)
    np.testing.assert_array_equal(nn.predict(model, x), nn.predict(model, x.astype(np.float32)))
    assert nn.predict(model.double(), x).dtype == np.float64


def test_other_losses_and_metrics_serve():
    x, y = points()
    model = linear(width=1)
    target = y[:, None].astype(np.float32)

    def error(prediction, target):
        return float(np.abs(prediction - target).mean())

    def right(prediction, target):
        return nn.binary_accuracy(prediction, target, threshold=0.0)

    optimizer = nn.SGD(model.parameters(), lr=1.0)
    how = {"loss": nn.BCEWithLogitsLoss(), "metrics": [error, right], "epochs": 10, "verbose": 0}
    history = nn.fit(model, x, target, optimizer=optimizer, **how)
    assert history.history["right"][-1] > 0.9
    assert len(history.history["error"]) == 10
    assert nn.evaluate(model, x, target, loss=nn.MSELoss(), metrics=["binary_accuracy"]).keys() == {
        "loss",
        "binary_accuracy",
    }


def test_accuracy_counts_classes_probabilities_and_pixels():
    prediction = np.array([[0.2, 0.8], [0.9, 0.1], [0.6, 0.4]])
    assert nn.accuracy(prediction, np.array([1, 0, 1])) == pytest.approx(2 / 3)
    assert nn.accuracy(prediction, prediction) == 1
    assert nn.accuracy(np.zeros((2, 3, 4)), np.zeros((2, 4), int)) == 1
    with pytest.raises(fastconv.ShapeError, match=r"target must have shape \(3,\)"):
        nn.accuracy(prediction, np.array([1, 0]))


def test_a_penalty_shows_in_the_loss_and_shrinks_the_weights():
    free, plain = quick(epochs=5)
    held, penalised = quick(epochs=5, penalty=[nn.L2(0.1), nn.L1(0.01)])
    assert np.abs(held[0].weight.data).sum() < np.abs(free[0].weight.data).sum()
    assert penalised.history["loss"][0] > plain.history["loss"][0]


def test_frozen_layers_stay_while_a_new_head_is_trained():
    body, head = nn.Linear(4, 4, activation="tanh", rng=0), nn.Linear(4, 2, rng=1)
    body.requires_grad_(False)
    before = body.state_dict()
    model, history = quick(nn.Sequential(body, head), epochs=5)
    for name, array in body.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.parametrize(("how", "message"), [
    ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ({"epochs": -1}, "epochs must be at least 0, not -1"),
    ({"x": np.ones((3, 4), np.float32)}, "x and y must have the same number of samples, at least one, not 3 and 200"),
    ({"y": [1, 2]}, "y must be a NumPy array, not list"),
    ({"validation_split": 1.0}, "validation_split must be at least 0 and below 1, not 1.0"),
    ({"validation_split": 0.1, "validation_data": points(5)}, "validation_data and validation_split say the same"),
    ({"metrics": ["precision"]}, "metrics must be functions or of 'accuracy', 'binary_accuracy', not 'precision'"),
    ({"callbacks": [nn.EarlyStopping()]}, "monitor='val_loss' is not among 'loss', 'learning_rate'; it needs"),
])  # fmt: skip
def test_wrong_arguments_are_named(how, message):
    with pytest.raises(fastconv.FastconvError, match=message):
        quick(**how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"loss": "mse"}, r"loss must be a loss such as nn\.CrossEntropyLoss\(\), not 'mse'"),
        ({"loss": nn.MSELoss}, "loss must be a loss such as"),
        ({"validation_data": points()[0]}, r"validation_data must be \(x, y\), not ndarray"),
    ],
)
def test_what_is_no_loss_or_no_pair_is_refused(how, message):
    with pytest.raises(fastconv.ArgumentTypeError, match=message):
        quick(**how)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.MaxPool2d(2), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 4, 3))])
def test_images_without_channels_are_no_single_image(layer):
    x, y = np.zeros((6, 8, 8), np.float32), np.zeros(6, np.int64)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 2))
    name = "MaxPool2d" if isinstance(layer, nn.MaxPool2d) else "Conv2d"
    message = rf"x must have 4 dimensions, .* for {name}, not shape \(6, 8, 8\); x\[:, None\] adds"
    for call in (lambda: quick(model, x, y), lambda: nn.evaluate(model, x, y), lambda: nn.predict(model, x)):
        with pytest.raises(fastconv.ShapeError, match=message):
            call()
    x, y = np.zeros((9, 4, 8, 8), np.float32), np.zeros(9, np.int64)
    last = nn.Sequential(nn.Conv3d(8, 4, 3, data_format="channels_last"))
    with pytest.raises(fastconv.ShapeError, match=r"x\[\.\.\., None\] adds"):
        quick(last, x, y)


def test_a_model_may_add_the_channels_itself():
    class Model(nn.Sequential):
        def forward(self, x):
            return super().forward(x[:, None])

    model = Model(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    assert nn.predict(model, np.zeros((6, 4, 4), np.float32)).shape == (6, 2)


def test_a_layer_may_add_the_channels_itself():
    class Layer(nn.ReLU):
        def forward(self, x):
            return super().forward(x[:, None])

    class Convolution(nn.Conv2d):
        def forward(self, x):
            return super().forward(x[:, None])

    x = np.zeros((6, 4, 4), np.float32)
    for layers in ((Layer(), nn.Conv2d(1, 2, 3)), (Convolution(1, 2, 3),)):
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))
        assert nn.predict(model, x).shape == (6, 2)


def test_predictions_are_a_row_for_each_sample():
    with pytest.raises(fastconv.ShapeError, match=r"must return a row for each of 8 samples, not shape \(3,\)"):
        nn.predict(nn.Sequential(nn.Linear(8, 3)), np.zeros(8, np.float32))
    images = np.zeros((8, 6, 6), np.float32)
    with pytest.raises(fastconv.ShapeError, match="a row for each of 8 samples"):
        nn.predict(nn.Sequential(nn.Concat(nn.Conv2d(8, 3, 3, padding=1)), nn.AdaptiveAvgPool2d(1)), images)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(fastconv.ArgumentError, match="optimizer has none of the model's parameters"):
        nn.Trainer(linear(), nn.SGD(linear().parameters(), lr=0.1))


def test_one_callback_needs_no_list():
    recorder = Recorder()
    quick(callbacks=recorder)
    assert recorder.calls[0] == "train begin"


def test_a_trainer_needs_a_model_and_an_optimizer():
    with pytest.raises(fastconv.ArgumentTypeError, match="model must be a Module, not 3"):
        nn.Trainer(3, nn.SGD(linear().parameters()))
    with pytest.raises(fastconv.ArgumentTypeError, match=r"optimizer must be an optimiser of fastconv\.nn, not 'adam'"):
        nn.Trainer(linear(), "adam")


# --- callbacks ---


def test_callbacks_are_called_in_order_and_told_the_end_even_after_an_error():
    recorder = Recorder()
    x, y = points(10)
    quick(x=x, y=y, batch_size=6, epochs=1, callbacks=[recorder], validation_data=(x, y))
    end = "epoch 0 end loss learning_rate val_loss"
    assert recorder.calls == ["train begin", "epoch 0 begin", "batch 0", "batch 1", end, "train end"]

    class Broken(nn.Callback):
        def on_batch_end(self, batch, logs):
            raise RuntimeError("broken")

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="broken"):
        quick(callbacks=[Broken(), recorder])
    assert recorder.calls[-1] == "train end"


def test_early_stopping_waits_and_brings_back_the_best_weights():
    states = []

    class Keep(nn.Callback):
        def on_epoch_end(self, epoch, logs):
            states.append(self.trainer.model.state_dict())

    stopping = nn.EarlyStopping(patience=2, restore_best_weights=True)
    fake = Fake("val_loss", [5.0, 4.0, 4.5, 4.1, 1.0])
    model, history = quick(epochs=5, callbacks=[fake, Keep(), stopping])
    assert history.epoch == [0, 1, 2, 3]
    assert (stopping.stopped_epoch, stopping.best_epoch, stopping.best) == (3, 1, 4.0)
    np.testing.assert_array_equal(model.state_dict()["0.weight"], states[1]["0.weight"])


@pytest.mark.parametrize(("options", "values", "epochs"), [
    ({"monitor": "val_accuracy"}, [0.1, 0.2, 0.2, 0.9], 3),
    ({"monitor": "score", "mode": "max"}, [1, 2, 1, 9], 3),
    ({"monitor": "score", "min_delta": 0.5}, [9, 8.8, 1, 0], 2),
    ({"monitor": "score", "baseline": 1.0}, [2, 1, 0, 0], 1),
    ({"monitor": "score", "patience": 3}, [3, 4, 2, math.nan], 4),
])  # fmt: skip
def test_early_stopping_follows_what_it_is_told(options, values, epochs):
    _, history = quick(epochs=4, callbacks=[Fake(options["monitor"], values), nn.EarlyStopping(**options)])
    assert len(history.epoch) == epochs


def test_checkpoints_are_written_every_epoch_or_for_the_best_only(tmp_path):
    fake = Fake("val_loss", [3.0, 1.0, 2.0])
    every = nn.ModelCheckpoint(tmp_path / "every-{epoch:02d}-{val_loss:.1f}.npz")
    best = nn.ModelCheckpoint(str(tmp_path / "best.npz"), save_best_only=True)
    model, _ = quick(callbacks=[fake, every, best])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.npz", "every-01-3.0.npz", "every-02-1.0.npz", "every-03-2.0.npz"]
    one, two = linear(), linear()
    nn.load_weights(one, tmp_path / "best.npz")
    nn.load_weights(two, tmp_path / "every-02-1.0.npz")
    np.testing.assert_array_equal(one[0].weight.data, two[0].weight.data)
    nn.load_weights(one, tmp_path / "every-03-2.0.npz")
    np.testing.assert_array_equal(one[0].weight.data, model[0].weight.data)
    with pytest.raises(fastconv.ArgumentError, match=r"names 'acc', which is not among \['learning_rate', 'loss'\]"):
        quick(callbacks=[nn.ModelCheckpoint(tmp_path / "{acc}.npz")])


def test_the_csv_log_has_a_line_per_epoch_and_can_be_continued(tmp_path):
    path = tmp_path / "log.csv"
    _, history = quick(callbacks=[nn.CSVLogger(path)])
    quick(epochs=1, callbacks=[nn.CSVLogger(path, append=True)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "0"]
    assert [float(row["loss"]) for row in rows[:3]] == history.history["loss"]


def test_the_learning_rate_follows_a_function_or_a_schedule():
    _, history = quick(lr=1.0, callbacks=[nn.LearningRateScheduler(lambda epoch, lr: lr * 0.5 if epoch else lr)])
    assert history.history["learning_rate"] == [1.0, 0.5, 0.25]
    model = linear()
    optimizer = nn.SGD(model.parameters(), lr=1.0)
    schedule = nn.LearningRateScheduler(nn.StepLR(optimizer, 2, 0.1))
    history = nn.fit(model, *points(), optimizer=optimizer, epochs=4, verbose=0, callbacks=[schedule])
    assert history.history["learning_rate"] == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_the_learning_rate_falls_on_a_plateau():
    reduce = nn.ReduceLROnPlateau(factor=0.5, patience=2, cooldown=1, min_lr=0.3)
    _, history = quick(lr=1.0, epochs=9, callbacks=[Fake("val_loss", [1.0] * 9), reduce])
    # Two epochs without improvement, one of rest, two more: halved after epochs 2 and 5, then held at the minimum.
    assert history.history["learning_rate"] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3]
    _, history = quick(
        lr=1.0, epochs=4, callbacks=[Fake("val_loss", [4.0, 3.0, 2.0, 1.0]), nn.ReduceLROnPlateau(patience=1)]
    )
    assert history.history["learning_rate"] == [1.0] * 4
    with pytest.raises(fastconv.ArgumentError, match="factor must lie between 0 and 1, not 2"):
        nn.ReduceLROnPlateau(factor=2)


def test_a_loss_that_is_nan_ends_training(capsys):
    x, y = points(20)
    x[9] = np.nan
    recorder = Recorder()
    _, history = quick(x=x, y=y, batch_size=5, shuffle=False, callbacks=[nn.TerminateOnNaN(), recorder])
    assert history.epoch == [0]
    assert "batch 1" in recorder.calls
    assert "batch 2" not in recorder.calls
    assert "batch 1: the loss is nan, training stops" in capsys.readouterr().err


def test_a_line_per_epoch_is_printed_unless_silent(capsys):
    quick(epochs=2, metrics=["accuracy"])
    assert capsys.readouterr() == ("", "")
    quick(epochs=2, metrics=["accuracy"], verbose=1)
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 2
    assert re.match(r"epoch 1/2  \d+\.\d s  [\d,]+ images/s  loss \d\.\d{4}  accuracy \d\.\d{4}$", out.splitlines()[0])


def test_a_bar_is_shown_on_a_terminal_and_its_absence_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    quick(epochs=1, verbose=1)
    assert "epoch 1/1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    quick(epochs=1, verbose=1)
    assert capsys.readouterr().err == ""


def test_tensorboard_writes_through_a_writer_and_says_what_is_missing(monkeypatch):
    class Writer:
        def __init__(self, directory=None):
            self.scalars, self.closed, self.directory = [], False, directory

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, step))

        def close(self):
            self.closed = True

    writer = Writer()
    quick(epochs=1, validation_split=0.1, callbacks=[nn.TensorBoard(writer=writer)])
    tags = [("loss/training", 0), ("learning_rate/training", 0), ("loss/validation", 0)]
    assert writer.scalars == tags
    assert writer.closed
    module = type(sys)("tensorboardX")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    assert nn.TensorBoard("somewhere").writer.directory == "somewhere"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fastconv.MissingDependencyError, match="pip install tensorboardX"):
        nn.TensorBoard()
