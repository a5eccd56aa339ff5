"""The Space: the demo that ships with the package. Settings are environment variables, see README.md."""

try:
    import spaces  # noqa: F401  (on ZeroGPU it must come before torch)
except ImportError:
    pass

from palette_diffusers.demo import launch

if __name__ == "__main__":
    launch()
