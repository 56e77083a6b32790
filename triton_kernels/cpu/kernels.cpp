// What Python calls (native.py): each function takes one struct, packed there member by member.
#include <algorithm>

#include "append.h"
#include "attention.h"
#include "blocks.h"

extern "C" {

// Sizes of the structs, which Python compares with its own.
void kvquant_sizes(int64_t* sizes) {
    sizes[0] = sizeof(kv::Attention);
    sizes[1] = sizeof(kv::Append);
    sizes[2] = sizeof(kv::Encode);
    sizes[3] = sizeof(kv::Rotate);
    sizes[4] = sizeof(kv::Bucket);
    sizes[5] = sizeof(kv::Search);
    sizes[6] = sizeof(kv::UnpackBlocks);
    sizes[7] = sizeof(kv::MultiplyBlocks);
}

void kvquant_attend(const kv::Attention* call) { kv::attend(*call); }
void kvquant_append(const kv::Append* call) { kv::append(*call); }
void kvquant_encode(const kv::Encode* call) { kv::encode(*call); }
void kvquant_rotate(const kv::Rotate* call) { kv::rotate(*call); }
void kvquant_bucket(const kv::Bucket* call) { kv::bucket(*call); }
void kvquant_search(const kv::Search* call) { kv::search(*call); }
void kvquant_unpack(const kv::UnpackBlocks* call) { kv::unpack(*call); }
void kvquant_multiply(const kv::MultiplyBlocks* call) { kv::multiply(*call); }
}
