"""Writes the checkpoints of this folder with TensorFlow: python make_fixtures.py (TensorFlow 2.21, tf_keras 2.21).

  electra.tar.xz   tf.compat.v1.train.Saver, the original's variables with Adam's slots: E != H, two layers and one
  nvidia.tar.xz    tf.train.Checkpoint over objects with the attributes of NVIDIA's port, float16 training
  types.tar.xz     many types and shapes, two shards, and names that fill more than one block of the index
  sliced.tar.xz    a partitioned variable

What the variables hold follows from their names (tests/tf_bundles.py); for `nvidia` from the original's names.
"""

import io
import os
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))
import tensorflow as tf
import tf_bundles
import tf_keras

v1 = tf.compat.v1


def pack(name: str, folder: Path) -> None:
    """Puts the files of `folder` into name.tar.xz."""
    with tarfile.open(Path(__file__).parent / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for file in sorted(folder.iterdir()):
            info = tarfile.TarInfo(f"{name}/{file.name}")
            info.size = file.stat().st_size
            archive.addfile(info, io.BytesIO(file.read_bytes()))
            print(f"{name}/{file.name}: {info.size:,} bytes")


# --- The original -------------------------------------------------------------------------------


def variable(name: str, *shape: int) -> None:
    """A variable with its Adam slots in the current scope."""
    full = "/".join(filter(None, (v1.get_variable_scope().name, name)))
    for suffix in ("", "/adam_m", "/adam_v"):
        initial = v1.constant_initializer(tf_bundles.values(full + suffix, shape))
        v1.get_variable(name + suffix, shape, tf.float32, initial, trainable=not suffix)


def dense(scope: str, inputs: int, outputs: int) -> None:
    variable(f"{scope}/kernel", inputs, outputs)
    variable(f"{scope}/bias", outputs)


def norm(scope: str, size: int) -> None:
    variable(f"{scope}/beta", size)
    variable(f"{scope}/gamma", size)


def tables(scope: str, vocab: int, width: int, positions: int) -> None:
    with v1.variable_scope(f"{scope}/embeddings"):
        variable("word_embeddings", vocab, width)
        variable("token_type_embeddings", 2, width)
        variable("position_embeddings", positions, width)
        norm("LayerNorm", width)


def encoder(scope: str, layers: int, embedding: int, hidden: int, feed_forward: int) -> None:
    with v1.variable_scope(scope):
        if embedding != hidden:
            dense("embeddings_project", embedding, hidden)
        for i in range(layers):
            with v1.variable_scope(f"encoder/layer_{i}"):
                for part in ("query", "key", "value"):
                    dense(f"attention/self/{part}", hidden, hidden)
                dense("attention/output/dense", hidden, hidden)
                norm("attention/output/LayerNorm", hidden)
                dense("intermediate/dense", hidden, feed_forward)
                dense("output/dense", feed_forward, hidden)
                norm("output/LayerNorm", hidden)


def heads(vocab: int, embedding: int, hidden: int, generator: int) -> None:
    dense("generator_predictions/dense", generator, embedding)
    norm("generator_predictions/LayerNorm", embedding)
    variable("generator_predictions/output_bias", vocab)
    dense("discriminator_predictions/dense", hidden, hidden)
    dense("discriminator_predictions/dense_1", hidden, 1)


def make_electra(folder: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        tables("electra", 37, 24, 16)
        encoder("electra", 2, 24, 128, 96)
        encoder("generator", 1, 24, 32, 24)
        heads(37, 24, 128, 32)
        v1.get_variable("global_step", (), tf.int64, v1.constant_initializer(123), trainable=False)
        session.run(v1.global_variables_initializer())
        v1.train.Saver(save_relative_paths=True).save(session, str(folder / "model.ckpt"), global_step=123,
                                                      write_meta_graph=False)


def make_sliced(folder: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        v1.get_variable("whole", (4,), tf.float32, v1.constant_initializer(tf_bundles.values("whole", (4,))))
        v1.get_variable("parts", (10, 4), tf.float32, v1.zeros_initializer(),
                        partitioner=v1.fixed_size_partitioner(2))
        session.run(v1.global_variables_initializer())
        v1.train.Saver(save_relative_paths=True).save(session, str(folder / "model.ckpt"), write_meta_graph=False)


# --- Types and shards ---------------------------------------------------------------------------


def make_types(folder: Path) -> None:
    shapes = tf_bundles.TYPES | {name: ("float32", ()) for name in tf_bundles.LONG_NAMES}
    shards = []
    for shard in range(2):
        mine = list(shapes)[shard::2]
        tensors = [tf.constant(tf_bundles.values(name, shapes[name][1], shapes[name][0])) for name in mine]
        shards.append(str(folder / f"part{shard}"))
        tf.raw_ops.SaveV2(prefix=shards[-1], tensor_names=mine, shape_and_slices=[""] * len(mine), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=shards, destination_prefix=str(folder / "two"))


# --- NVIDIA's port: the same attributes on the same kinds of objects ----------------------------


Layer, Model, Dense = tf_keras.layers.Layer, tf_keras.Model, tf_keras.layers.Dense


class Embeddings(Layer):
    def __init__(self, vocab, width, positions):
        super().__init__()
        self.size = (vocab, width)
        self.position_embeddings = tf_keras.layers.Embedding(positions, width)
        self.token_type_embeddings = tf_keras.layers.Embedding(2, width)
        self.LayerNorm = tf_keras.layers.LayerNormalization()

    def build(self, shape):
        self.word_embeddings = self.add_weight("weight", shape=self.size)
        super().build(shape)

    def call(self, ids):
        return self.LayerNorm(tf.gather(self.word_embeddings, ids) + self.position_embeddings(ids * 0)
                              + self.token_type_embeddings(ids * 0))


class Residual(Layer):
    def __init__(self, width):
        super().__init__()
        self.dense, self.LayerNorm = Dense(width), tf_keras.layers.LayerNormalization()

    def call(self, inputs):
        return self.LayerNorm(self.dense(inputs[0]) + inputs[1])


class SelfAttention(Layer):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = Dense(width), Dense(width), Dense(width)

    def call(self, x):
        return self.query(x) * self.key(x) * self.value(x)


class Attention(Layer):
    def __init__(self, width):
        super().__init__()
        self.self_attention, self.dense_output = SelfAttention(width), Residual(width)

    def call(self, x):
        return self.dense_output([self.self_attention(x), x])


class Block(Layer):
    def __init__(self, width, feed_forward):
        super().__init__()
        self.attention, self.intermediate = Attention(width), Layer()
        self.intermediate.dense = Dense(feed_forward)
        self.bert_output = Residual(width)

    def call(self, x):
        x = self.attention(x)
        return self.bert_output([self.intermediate.dense(x), x])


class Encoder(Layer):
    def __init__(self, layers, width, feed_forward):
        super().__init__()
        self.layer = [Block(width, feed_forward) for _ in range(layers)]

    def call(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


class Main(Model):
    def __init__(self, embeddings, width, layers, feed_forward):
        super().__init__()
        self.embeddings = embeddings
        if embeddings.size[1] != width:
            self.embeddings_project = Dense(width)
        self.encoder = Encoder(layers, width, feed_forward)

    def call(self, ids):
        x = self.embeddings(ids)
        return self.encoder(self.embeddings_project(x) if hasattr(self, "embeddings_project") else x)


class Discriminator(Model):
    def __init__(self, main, width):
        super().__init__()
        self.electra = main
        self.discriminator_predictions = Layer()
        self.discriminator_predictions.dense = Dense(width)
        self.discriminator_predictions.dense_prediction = Dense(1)

    def call(self, ids):
        return self.discriminator_predictions.dense_prediction(
            self.discriminator_predictions.dense(self.electra(ids)))


class OutputHead(Layer):
    def __init__(self, embeddings):
        super().__init__()
        self.input_embeddings = embeddings

    def build(self, shape):
        self.bias = self.add_weight("bias", shape=self.input_embeddings.size[:1])
        super().build(shape)

    def call(self, x):
        return tf.matmul(x, self.input_embeddings.word_embeddings, transpose_b=True) + self.bias


class Generator(Model):
    def __init__(self, main):
        super().__init__()
        self.electra = main
        self.generator_predictions = Layer()
        self.generator_predictions.LayerNorm = tf_keras.layers.LayerNormalization()
        self.generator_predictions.dense = Dense(main.embeddings.size[1])
        self.generator_lm_head = OutputHead(main.embeddings)

    def call(self, ids):
        x = self.generator_predictions.dense(self.electra(ids))
        return self.generator_lm_head(self.generator_predictions.LayerNorm(x))


class Pretraining(Model):
    def __init__(self):
        super().__init__()
        embeddings = Embeddings(40, 64, 16)    # 37 pieces, padded to a multiple of 8
        self.discriminator = Discriminator(Main(embeddings, 64, 1, 96), 64)
        self.generator = Generator(Main(embeddings, 32, 1, 128))

    def call(self, ids):
        return tf.reduce_sum(self.discriminator(ids)) + tf.reduce_sum(self.generator(ids))


def nvidia_names(model):
    """Pairs of a variable and its name in the original, written out by hand."""
    def pair(layer, name):
        kernel, bias = ("gamma", "beta") if hasattr(layer, "gamma") else ("kernel", "bias")
        return [(getattr(layer, kernel), f"{name}/{kernel}"), (getattr(layer, bias), f"{name}/{bias}")]

    disc, gen = model.discriminator, model.generator
    tables = disc.electra.embeddings
    out = [(tables.word_embeddings, "electra/embeddings/word_embeddings"),
           (tables.position_embeddings.embeddings, "electra/embeddings/position_embeddings"),
           (tables.token_type_embeddings.embeddings, "electra/embeddings/token_type_embeddings"),
           *pair(tables.LayerNorm, "electra/embeddings/LayerNorm"),
           *pair(gen.electra.embeddings_project, "generator/embeddings_project"),
           *pair(gen.generator_predictions.dense, "generator_predictions/dense"),
           *pair(gen.generator_predictions.LayerNorm, "generator_predictions/LayerNorm"),
           (gen.generator_lm_head.bias, "generator_predictions/output_bias"),
           *pair(disc.discriminator_predictions.dense, "discriminator_predictions/dense"),
           *pair(disc.discriminator_predictions.dense_prediction, "discriminator_predictions/dense_1")]
    for network, scope in ((disc, "electra"), (gen, "generator")):
        for i, block in enumerate(network.electra.encoder.layer):
            name = f"{scope}/encoder/layer_{i}"
            for part in ("query", "key", "value"):
                out += pair(getattr(block.attention.self_attention, part), f"{name}/attention/self/{part}")
            out += pair(block.attention.dense_output.dense, f"{name}/attention/output/dense")
            out += pair(block.attention.dense_output.LayerNorm, f"{name}/attention/output/LayerNorm")
            out += pair(block.intermediate.dense, f"{name}/intermediate/dense")
            out += pair(block.bert_output.dense, f"{name}/output/dense")
            out += pair(block.bert_output.LayerNorm, f"{name}/output/LayerNorm")
    return out


def make_nvidia(folder: Path) -> None:
    model = Pretraining()
    adam = tf_keras.optimizers.legacy.Adam()
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(adam)
    with tf.GradientTape() as tape:
        loss = model(tf.zeros((1, 2), tf.int32))
    grads = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    pairs = nvidia_names(model)
    assert len(pairs) == len(model.trainable_variables)
    for variable, name in pairs:
        for target, suffix in ((variable, ""), (adam.get_slot(variable, "m"), "/adam_m"),
                               (adam.get_slot(variable, "v"), "/adam_v")):
            target.assign(tf_bundles.values(name + suffix, tuple(variable.shape)))
    checkpoint = tf.train.Checkpoint(step=tf.Variable(77), phase2=tf.Variable(False), optimizer=optimizer, model=model)
    path = tf.train.CheckpointManager(checkpoint, str(folder), 1).save(checkpoint_number=77)
    print("\n".join(name for name, _ in tf.train.list_variables(path) if "layer/0/attention/self_attention/q" in name
                    or "embeddings" in name or "optimizer/" in name[:12]))


def main() -> None:
    for name, make in (("types", make_types), ("nvidia", make_nvidia), ("electra", make_electra),
                       ("sliced", make_sliced)):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            pack(name, Path(folder))


if __name__ == "__main__":
    main()
