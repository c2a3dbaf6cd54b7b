"""What a GPU is asked to do is read off a compiled program."""

import re

from benchmarks import launches

PROGRAM = """\
HloModule jit_step

%fused_convert (p: f32[4,8]) -> bf16[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %c = bf16[4,8]{1,0} convert(%p), metadata={op_name="jit(step)/f"}
}

%fused_transpose (p.1: bf16[4,8]) -> bf16[8,4] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %t = bf16[8,4]{1,0} transpose(%p.1), dimensions={1,0}
}

%fused_slice (p.4: f32[4,8], p.5: f32[4,8], p.6: f32[]) -> bf16[4] {
  %p.4 = f32[4,8]{1,0} parameter(0)
  %flat = f32[32]{0} bitcast(%p.4)
  %narrow = bf16[32]{0} convert(%flat)
  %some = bf16[8]{0} slice(%narrow), slice={[0:8]}
  %first = bf16[4]{0} slice(%some), slice={[0:4]}
  %p.5 = f32[4,8]{1,0} parameter(1)
  %p.6 = f32[] parameter(2)
  %all = f32[] reduce(%p.5, %p.6), dimensions={0,1}, to_apply=%add
  %second = f32[4]{0} slice(%p.5), slice={[4:8]}
  %sum = f32[4]{0} add(%first, %second)
  ROOT %c.1 = bf16[4]{0} convert(%sum)
}

%fused_pad (p.2: bf16[8,49]) -> bf16[8,50] {
  %p.2 = bf16[8,49]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %n = bf16[8,49]{1,0} negate(%p.2)
  ROOT %pad = bf16[8,50]{1,0} pad(%n, %zero), padding=0_0x0_1
}

%fused_norm (p.3: bf16[8,4]) -> (bf16[8,4], f32[8], f32[8], f32[8], f32[8], f32[8]) {
  %p.3 = bf16[8,4]{1,0} parameter(0)
  %r = f32[8]{0} reduce(%p.3, %p.3), dimensions={1}, to_apply=%add
  ROOT %all = (bf16[8,4]{1,0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, \
/*index=5*/f32[8]{0}) tuple(%p.3, %r, %r, %r, %r, %r)
}

%body (carry: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %carry = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%carry), index=1
  %i = s32[] get-tuple-element(%carry), index=0
  %own.1 = (f32[4,4]{1,0}, s8[4194304]{0}) custom-call(%x, %x), \
custom_call_target="__cublas$lt$matmul"
  %y = f32[4,4]{1,0} get-tuple-element(%own.1), index=0
  ROOT %next = (s32[], f32[4,4]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: f32[4,8], b: bf16[8,49], d: f32[4,4]) -> bf16[8,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[8,49]{1,0} parameter(1)
  %d = f32[4,4]{1,0} parameter(2)
  %wrapped_convert.3 = bf16[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused_convert
  %loop_transpose_fusion = bf16[8,4]{1,0} fusion(%wrapped_convert.3), kind=kLoop, \
calls=%fused_transpose, metadata={op_name="jit(step)/encoder/blocks_1/transpose"}
  %one = f32[] constant(1)
  %slice_fusion = bf16[4]{0} fusion(%a, %a, %one), kind=kLoop, calls=%fused_slice
  %loop_pad_fusion = bf16[8,50]{1,0} fusion(%b), kind=kLoop, calls=%fused_pad
  %fusion.7 = (bf16[8,4]{1,0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, \
/*index=5*/f32[8]{0}) fusion(%loop_transpose_fusion), kind=kCustom, \
calls=%fused_norm, metadata={op_name="jit(step)/encoder/blocks_1/dec_norms_1/mul"}
  %fusion.8 = (bf16[8,4]{1,0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, \
/*index=5*/f32[8]{0}) fusion(%loop_transpose_fusion), kind=kCustom, \
calls=%fused_norm, metadata={op_name="jit(step)/encoder/blocks_2/dec_norms_2/mul"}
  %zero.1 = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero.1, %d)
  %while.1 = (s32[], f32[4,4]{1,0}) while(%start), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %g = bf16[8,4]{1,0} get-tuple-element(%fusion.7), index=0
  %attend = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%g, %g, %g), \
custom_call_target="__cudnn$fmhaSoftmax"
  %out = bf16[8,4]{1,0} get-tuple-element(%attend), index=0
  %again = bf16[8,4]{1,0} bitcast(%out)
  ROOT %copy.9 = bf16[8,4]{1,0} copy(%again)
}
"""


def test_kernels_are_counted_with_the_bytes_that_they_take_and_give():
    norm = 2 * 64 + 5 * 32
    assert [
        (kernel.name, kernel.kind, kernel.num_bytes, sorted(kernel.inputs))
        for kernel in launches.kernels(PROGRAM)
    ] == [
        ("wrapped_convert.3", "convert", 128 + 64, ["f32"]),
        ("loop_transpose_fusion", "copy", 128, ["bf16"]),
        ("slice_fusion", "other", 8 + 16 + 128 + 4, ["f32"]),  # of one a part
        ("loop_pad_fusion", "pad", 784 + 800, ["bf16"]),
        ("fusion.7", "other", norm, ["bf16"]), ("fusion.8", "other", norm, ["bf16"]),
        *[("own.1", "product", 128, ["f32"])] * 3,  # work space does not count
        ("attend", "attention", 128, ["bf16"]), ("copy.9", "copy", 128, ["bf16"]),
    ]


def test_a_table_tells_what_is_between_the_products():
    found = list(launches.kernels(PROGRAM))
    between = 192 + 128 + 156 + 1584 + 2 * 288 + 128
    assert dict(zip(launches.HEAD, launches.cells("mine", found), strict=True)) == {
        "config": "mine", "kernels": "11", "products": "3", "of float32": "3",
        "attention": "1", "between them": "7", "GB moved there": f"{between / 1e9:.1f}",
        "copies": "2, 0.00 GB", "converts": "1, 0.00 GB", "pads": "1, 0.00 GB",
        "of norms": "2, 0.00 GB",
    }
    first, second = launches.largest(found, most=2)[2:]
    assert first == "| loop_pad_fusion | pad |  | 0.00 | 1 |"
    assert second == "| fusion | other | encoder/blocks_*/dec_norms_*/mul | 0.00 | 2 |"


def test_the_step_of_a_configuration_is_compiled_and_read(capsys):
    launches.main([
        "--config=configs/digits_cross.py", "--batch=8", "--target=this", "--most=3",
        *[f"--override={override}" for override in (
            "model.encoder.size=W16-D1-H2/4", "model.decoder.dim=16",
            "model.decoder.depth=1", "model.decoder.num_heads=2", "model.dtype=bfloat16"
        )],
    ])
    printed = capsys.readouterr().out
    assert "batch 8: compiled for this, not run" in printed
    row = re.search(r"^\| digits_cross \| (\d+) \| (\d+) \| ", printed, re.MULTILINE)
    assert int(row[1]) > int(row[2]) > 0
    assert len(printed.split("| kernel | kind |")[1].strip().splitlines()) == 1 + 1 + 3
