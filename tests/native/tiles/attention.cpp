// The attention kernels of one instruction set, compiled by test_tiles.py with emulated tiles.
#include "cpu/attention_gemm.cpp"
// The others' names do not clash, and one compilation is cheaper than three.
#include "cpu/attention_backward.cpp"
#include "cpu/attention_forward.cpp"

void tf::TF_ISA::attention_decode(const AttentionForward&) { __builtin_trap(); }  // for fewer queries than these tests'
void forward_tiles(const tf::AttentionForward& a) { tf::TF_ISA::attention_forward(a); }
void backward_tiles(const tf::AttentionBackward& a) { tf::TF_ISA::attention_backward(a); }
