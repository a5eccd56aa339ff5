"""The Space: the demo that ships with the package. Settings are environment variables, see README.md."""

from palette_diffusers.demo_files import own_folder

own_folder()  # before gradio is imported, which reads where its files go

try:
    import spaces  # noqa: F401  (on ZeroGPU it must come before torch)
except ImportError:
    pass

from palette_diffusers.demo import launch  # noqa: E402

if __name__ == "__main__":
    launch()
