"""halfseen: masked-image pretraining, distillation and fine-tuning of Vision Transformers."""

__version__ = "0.1.0"
