"""``python -m stock_server``: stock SGLang's server, on machines where sgl_kernel cannot load."""

from anchortp_sglang.platforms.cpu import sgl_kernel_stub

sgl_kernel_stub.install()  # at module level: every spawned child imports this module again

if __name__ == "__main__":
    import sys

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
